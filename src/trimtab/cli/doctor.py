"""`trimtab doctor`: what this installation can do."""

from __future__ import annotations

from trimtab.cli.app import Json, app
from trimtab.cli.support import check_writable, show, write_result


@app.command("doctor", epilog="Example: trimtab doctor")
def doctor_command(json_file: Json = None) -> None:
    """Show versions, device and memory, and what each extra would add."""
    from trimtab.doctor import diagnose

    check_writable(json_file)
    found = diagnose()
    show(found)
    write_result(json_file, found.to_dict())
