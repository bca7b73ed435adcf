"""Small instances of every public data set that pretraining reads, made from a rendered world.

Each in its own annotation format, with its own names of files and folders, and in the released
metadata layout beside; so that every reader can be run on data whose truth is known, the index of
the world. Nothing here is for training: the lists of the world itself are.

    FOLDER/kinetics400, ssv2                                           recognition
    FOLDER/retrieval, MSRVTT, MSVD, ActivityNetCaptions, DiDeMo, LSMDC, VATEX
    FOLDER/localization, ActivityNet, FineAction, HACS                 localization
    FOLDER/grounding, CharadesSTA, QVHighlights, TaCoS, ActivityNetCaptions, DiDeMo, QuerYD
    FOLDER/YoutubeVIS, LVVIS, COCOPseudoVIS                            instance segmentation
    FOLDER/MEVIS, ReferYoutubeVOS, ReferCOCOPseudo                     referring segmentation
"""

from __future__ import annotations

from pathlib import Path

from experiments.miniworld.releases.captions import write_retrieval
from experiments.miniworld.releases.grounding import write_grounding
from experiments.miniworld.releases.instances import write_instances
from experiments.miniworld.releases.localization import write_localization
from experiments.miniworld.releases.recognition import write_kinetics400, write_ssv2
from experiments.miniworld.releases.referring import write_referring
from experiments.miniworld.releases.source import read_source

__all__ = ["write_releases"]


def write_releases(
    world: Path | str, folder: Path | str, *, videos: int = 4
) -> dict[str, dict[str, object]]:
    """Write every data set below ``folder`` and return how to read it.

    Args:
        world: a rendered world, see `render_world`.
        folder: made; must not hold anything yet.
        videos: of each kind and split, at most.

    Returns:
        By "released/<task or data set>" or "public/<reader>", the fields of a
        `pretrain.config.TaskConfig`: the reader, its arguments ``train`` and ``val``, and the
        sampling and augmentation of its task.

    Raises:
        FileExistsError: ``folder`` is not empty.
        FileNotFoundError: ``world`` is not a rendered world.
        ValueError: ``videos`` is below 1, or the world lacks clips or streams of a split.
    """
    source, folder = read_source(Path(world), videos), Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; give a new folder for the releases")
    return {
        **write_kinetics400(source, folder / "kinetics400"),
        **write_ssv2(source, folder / "ssv2"),
        **write_retrieval(source, folder),
        **write_localization(source, folder),
        **write_grounding(source, folder),
        **write_instances(source, folder),
        **write_referring(source, folder),
    }
