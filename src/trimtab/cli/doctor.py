"""`trimtab doctor`: what this installation can do."""

from __future__ import annotations

from trimtab.cli.app import Json, app
from trimtab.cli.screen import Full, show
from trimtab.cli.support import check_writable, write_result


@app.command("doctor", epilog="Example: trimtab doctor")
def doctor_command(full: Full = False, json_file: Json = None) -> None:
    """Show versions, device and memory, and what each extra would add."""
    from trimtab.doctor import diagnose

    check_writable(json_file)
    found = diagnose()
    show(found, full=full)
    write_result(json_file, found.to_dict())
