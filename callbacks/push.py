"""`--push OWNER/NAME`: the folder that a command leaves, uploaded to the Hugging Face Hub."""

import shlex
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from callbacks.model_card import HFExport
from common.manifest import MARKER, check_manifest
from common.progress import interactive

_STALE = "*.safetensors*"  # in the repository, of an earlier result: loaders would take them for this one's


class Push:
    """The upload of one folder: what can be known is checked when this is made, the rest happens in ``upload``.

    Args:
        name: Repository, OWNER/NAME; a private one is made where there is none.
        folder: What the command will leave.

    Raises:
        ValueError: The name is none, there is no token, or the Hub is switched off.
    """

    def __init__(self, name: str, folder: Path) -> None:
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError(f"push: {error}") from None
        if name.count("/") != 1:
            raise ValueError(f"push: {name!r} has no owner; give OWNER/NAME, as in https://huggingface.co/OWNER/NAME")
        if is_offline_mode():
            raise ValueError("push: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it, or leave push out")
        if get_token() is None:
            raise ValueError("push: no token of the Hub; run `hf auth login`, or set HF_TOKEN to one that may write")
        self.name, self.folder = name, folder
        self._before = _written(folder)

    @property
    def command(self) -> str:
        """The command line that uploads the folder alone."""
        return f"hf upload {self.name} {shlex.quote(str(self.folder))} . --private --delete '{_STALE}'"

    def upload(self) -> str:
        """Upload the folder, its model card included, after comparing it with its manifest.

        Returns:
            The repository's address.

        Raises:
            DamagedError: The folder is not what was written.
            RuntimeError: The command has not written it; or the upload failed, or would have deleted the weights of
                something else that is in the repository: the folder is still there, and the
                message has the command that uploads it.
        """
        if _written(self.folder) == self._before:
            raise RuntimeError(f"push: nothing was written to {self.folder}, so nothing was uploaded")
        check_manifest(self.folder)
        if not interactive():
            disable_progress_bars()
        api = HfApi()
        try:
            address = str(api.create_repo(self.name, private=True, exist_ok=True))
            there = api.list_repo_files(self.name)
            foreign = MARKER not in there and any(fnmatch(name, _STALE) for name in there)
            if not foreign:
                api.upload_folder(repo_id=self.name, folder_path=self.folder, delete_patterns=_STALE)
        except Exception as error:  # of the network, of the Hub, of its client: all mean the same here
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RuntimeError(
                f"push: {self.name} could not be uploaded ({reason}); {self.folder} is complete. Again: {self.command}"
            ) from error
        if foreign:
            raise RuntimeError(
                f"push: {self.name} has weights that Pare did not write, so nothing was uploaded; {self.folder} is "
                f"complete. To another name: hf upload OWNER/NAME {shlex.quote(str(self.folder))} . --private"
            )
        return address


def left(command: str, callbacks: Sequence[Any], model: Any) -> Path | None:
    """The folder that a command leaves its result in; None where it leaves none."""
    if command == "fit":
        exported = [callback.dirpath for callback in callbacks if isinstance(callback, HFExport)]
        if exported:
            return Path(exported[0])
    leaves: Any = getattr(model, "leaves", None)
    return leaves(command) if leaves is not None else None


def _written(folder: Path) -> tuple[int, int] | None:
    """Which manifest a folder has."""
    marker = folder / MARKER
    if not marker.is_file():
        return None
    found = marker.stat()
    return found.st_ino, found.st_mtime_ns
