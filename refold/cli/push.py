"""`refold push`: upload of a folder to a model hub."""

from pathlib import Path
from typing import Annotated

import typer

from refold.cli import options
from refold.cli.show import note, print_json, print_table


def command(
    folder: Annotated[Path, typer.Argument(help="A folder that refold wrote.")],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made if there is none.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the files, and upload nothing.")] = False,
    json: options.Json = False,
) -> None:
    """Upload a folder to the Hugging Face hub."""
    from refold.exporting.push import check_repository, plan_upload, push

    check_repository(repository)
    upload = plan_upload(folder)
    for name in upload.left_out:
        note(f"not refold's, stays here: {name}")
    note(f"{len(upload.files)} files, {upload.num_bytes:,} bytes; provenance.json names local paths and commands")
    if dry_run:
        rows = list(upload.files.items())
        print_json(upload.files) if json else print_table(("file", "bytes"), [(n, f"{b:,}") for n, b in rows])
        return
    address = push(upload, repository, private=private, revision=revision)
    print_json({"commit": address}) if json else typer.echo(address)
