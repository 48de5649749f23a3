"""Hub: data files of a data set on the Hugging Face hub, kept in the hub client's own cache.

Only data files are fetched, never a script. Without a network what the cache has is used; if it has nothing, one line
says so and how to name local files.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from saferlhf.data.files import COMPRESSIONS, FORMATS
from saferlhf.errors import UserError

MEND = "give local files: data.path=FILE_OR_FOLDER, or data.root=FOLDER_OF_DATA_SETS"


def fetch(name: str, revision: str | None, patterns: Sequence[str] = ()) -> Path:
    """The folder with a data set's files at one commit; the folder is named by the commit.

    Args:
        name: `owner/name`.
        revision: branch, tag or commit; None for the newest.
        patterns: of the files to fetch; none for all data files.

    Raises:
        UserError: no such data set or revision, no access, or no answer and nothing in the cache.
    """
    return _fetch(name, revision, tuple(patterns))


@functools.cache  # a command asks several times: for its identity, for the rows
def _fetch(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    # our patterns see a slash before the first folder
    wanted = [form for pattern in patterns for form in (pattern, pattern.removeprefix("*/"))]
    wanted = wanted or [f"*.{kind}{end}" for kind in FORMATS for end in ("", *(f".{c}" for c in COMPRESSIONS))]
    try:
        folder = huggingface_hub.snapshot_download(
            name, repo_type="dataset", revision=revision, allow_patterns=list(dict.fromkeys(wanted))
        )
        return Path(folder)
    except errors.GatedRepoError:
        reason, mend = "it asks for an agreement", f"agree at huggingface.co/datasets/{name} and log in, or {MEND}"
    except errors.RepositoryNotFoundError:
        reason, mend = "there is none of this name, or it is private", f"check the name, or {MEND}"
    except errors.RevisionNotFoundError:
        reason, mend = f"it has no revision '{revision}'", "set data.revision=null for the newest"
    except errors.HFValidationError:
        reason, mend = "this is no name of a data set", "write data.hub=OWNER/NAME"
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        reason, mend = "no answer, and its files are not in the local cache", MEND
    except Exception as error:  # the client's own network errors share no public base class over its versions
        reason, mend = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}", MEND
    raise UserError(f"cannot get the data set {name} from the Hugging Face hub: {reason}", "data.hub", mend)
