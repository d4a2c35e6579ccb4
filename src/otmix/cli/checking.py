"""The command `check-method`: does a loss or a mixer of one's own keep the contract?"""

from __future__ import annotations

from pathlib import Path

from otmix.extensions import import_files


def check_method(name: str, /, *, imports: list[Path]) -> int:
    """Check that a method, your own included, does what every method must.

    It must build from its name, train every parameter, repeat and resume exactly, and more; exit code 1 where it does
    not. This takes seconds, on random images.

    Args:
        name: a method, e.g. my-loss, my-loss+otmix or ce+mymixer.
        imports: Python file to load first, with what you registered (`@register_loss`, `@register_mixer`); may be given
            several times.

    Examples:
        otmix check-method ldam-drw+otmix
        otmix check-method my-loss+otmix --import my_loss.py
    """
    import_files(imports)
    from rich.text import Text

    from otmix.display import stdout_console
    from otmix.methods import parse_method
    from otmix.training import contract

    console = stdout_console()
    method = parse_method(name)
    console.print(Text(f"{method.name}: {method.title}", style="bold"))
    with console.status("", spinner="dots") as status:
        findings = contract.check_method(name, lambda check: status.update(f"checking that it {check}"))
    for found in findings:
        mark, style = ("ok", "green") if found.problem is None else ("FAILED", "bold red")
        console.print(Text.assemble((f"  {mark:<8}", style), found.check))
        if found.problem is not None:
            console.print(Text(f"          {found.problem}"), soft_wrap=True)
    failed = sum(found.problem is not None for found in findings)
    console.print(f"{len(findings) - failed} of {len(findings)} checks passed", highlight=False)
    return 1 if failed else 0
