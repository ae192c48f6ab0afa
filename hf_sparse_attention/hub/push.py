"""A model folder -> a folder on this machine, or one commit on the Hub: everything is checked and rendered before
anything is sent, and a commit is there whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitInfo
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..config import VERSION
from ..files import is_empty, whole_folder
from .card import render
from .content import Files, collect, sound_model
from .evidence import check_licence, gather
from .upload import Destination, check_online, send_files


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class PushArguments:
    """Options of `push`. The access token comes from `hf auth login` or HF_TOKEN, never from an option."""

    model: str = field(metadata=_help("folder of a sparse model that convert or train wrote"))
    repo_id: str | None = field(
        default=None, metadata=_help("owner/name of the model on the Hub (needed unless --dry_run)")
    )
    dry_run: str | None = field(
        default=None, metadata=_help("write what would be uploaded into this new folder, and send nothing")
    )
    private: bool = field(default=False, metadata=_help("make the repository private if it is new"))
    revision: str | None = field(
        default=None, metadata=_help("branch to commit to, made if it is not there (default: main)")
    )
    create_pr: bool = field(default=False, metadata=_help("open a pull request instead of committing to the branch"))
    message: str | None = field(default=None, metadata=_help("commit message (default: the map and the version)"))
    summary: str | None = field(
        default=None, metadata=_help("summary.json of the training (default: in the model folder or above it)")
    )
    results: str | None = field(
        default=None, metadata=_help("results.json of evaluate (default: evaluation/ beside the model folder)")
    )
    report: str | None = field(
        default=None, metadata=_help("report.json of report (default: report/ beside the model folder)")
    )
    license: str | None = field(
        default=None, metadata=_help("licence identifier such as apache-2.0 (default: the base model's)")
    )

    def __post_init__(self):
        if self.repo_id is None and self.dry_run is None:
            raise ValueError("repo_id is missing: name the model on the Hub as owner/name, or a folder with --dry_run")
        if self.repo_id is not None:
            check_repo_id(self.repo_id)
        if self.license is not None:
            check_licence(self.license)


def check_repo_id(repo_id: str, field_name: str = "repo_id") -> None:
    """Raises ValueError for what is no owner/name: with a name alone the card could not say what to load."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{field_name} is {repo_id!r}; write owner/name. {error}") from None
    if "/" not in repo_id:
        raise ValueError(f"{field_name} is {repo_id!r}; write owner/name, such as your-name/{repo_id}")


def push_model(arguments: PushArguments) -> Path | CommitInfo:
    """Writes the folder of a dry run and returns it, or makes one commit on the Hub and returns what it says of it.

    Raises:
        ValueError: for a model that cannot be published, files that belong to another model, or a public repository
            where a private one was asked for.
        FileExistsError: if the folder of a dry run holds anything.
        OSError: if a file is missing or cannot be written, or the Hub cannot be reached or refuses. Nothing is
            committed then, and the error says what is on the Hub.
    """
    if arguments.dry_run is None:
        check_online()
    else:
        _check_output(Path(arguments.dry_run).expanduser(), Path(arguments.model).expanduser())
    checkpoint, parameters = sound_model(arguments.model)
    evidence = gather(
        checkpoint,
        parameters,
        summary=arguments.summary,
        results=arguments.results,
        report=arguments.report,
        licence=arguments.license,
    )
    branch = None if arguments.create_pr or arguments.revision in (None, "main") else arguments.revision
    card = render(evidence, name=_name(arguments), repo_id=arguments.repo_id, revision=branch)
    files = collect(checkpoint, card, evidence.licence.file)
    message = arguments.message or f"Sparse model, map {checkpoint.map}, by hf-sparse-attention {VERSION}"
    if arguments.dry_run is None:
        to = Destination(arguments.repo_id, arguments.revision, arguments.create_pr, arguments.private)
        return send_files(files, to, message)
    return _write(files, arguments, message)


def _name(arguments: PushArguments) -> str:
    if arguments.repo_id is not None:
        return arguments.repo_id.rpartition("/")[2]
    folder = Path(arguments.model).expanduser().resolve()
    # A training run keeps its model in a folder of that name.
    return folder.parent.name if folder.name == "model" and folder.parent.name else folder.name


def _check_output(output: Path, model: Path) -> None:
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"dry_run is {output}, which is a file; name a new folder")
    if output.exists() and not is_empty(output):
        raise FileExistsError(f"dry_run is {output}, which exists and is not empty; name a new folder")
    if model.resolve() in (output.resolve(), *output.resolve().parents):
        raise ValueError(
            f"dry_run is {output}, inside the model folder, which is never written to; name another folder"
        )


def _write(files: Files, arguments: PushArguments, message: str) -> Path:
    output = Path(arguments.dry_run).expanduser()
    with whole_folder(output) as folder:
        for name, content in files.items():
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                with content.open("rb") as source, (folder / name).open("wb") as target:
                    while piece := source.read(2**24):
                        target.write(piece)
    place = arguments.repo_id or "owner/name"
    way = "a pull request to" if arguments.create_pr else "one commit to"
    print(f"{output}, {len(files)} files:")
    print("\n".join(f"  {name:<40} {_size(content):>15,} bytes" for name, content in files.items()))
    print(
        f"Nothing was sent. Without --dry_run: {way} {place}, branch {arguments.revision or 'main'}"
        + (", private if it is new" if arguments.private else "")
        + f', "{message}"'
    )
    return output


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size
