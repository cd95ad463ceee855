"""Whether a study may write into its folder: it is not another study's, nor a second one of its own.

check_folder(loaded)           UsageError: runs/studies/sizes holds another study ('losses'), not 'sizes'
"""

from __future__ import annotations

from livt_scale.config.yaml import read_file, validated
from livt_scale.study.definition import LoadedStudy, Study
from livt_scale.util.errors import UsageError
from livt_scale.util.outside import real_path

KEPT = "study.yaml"  # the study's file, next to its runs


def check_folder(loaded: LoadedStudy) -> None:
    """Raise UsageError if another study is in the folder of this one, where a study leaves its file.

    Likewise if the folder is relative, and it is not here but in the folder of the file or above it.
    """
    kept = loaded.folder / KEPT
    if not kept.is_file():
        above = () if loaded.folder.is_absolute() else real_path(loaded.path).parents
        other = next((place for place in (f / loaded.folder for f in above) if (place / KEPT).is_file()), None)
        if other is None:
            return
        raise UsageError(
            f"the folder of the study is relative to the working directory: {loaded.folder.absolute()} would be "
            f"a second one beside {other}",
            remedy=f"continue that one with --out {other}; for another one give an absolute --out",
        )
    try:
        name = validated(read_file(kept, "study", what="study"), kept, Study).name
    except UsageError:
        name = "one that cannot be read"
    if name != loaded.study.name:
        raise UsageError(
            f"{loaded.folder} holds another study ({name!r}), not {loaded.study.name!r}",
            remedy="give another folder, as --out or in the file",
        )
