"""Everything that people look at: `figures`, `tables` and the HTML `page`. Nothing here trains or reads a model.

Inputs are plain values and the files of a run directory. matplotlib, jinja2 and rich are imported at their first use.
"""
