"""The table of label formats that `shards pack` reads and `predict` writes; to add one, see CONTRIBUTING.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpm_lmk.data.annotations import coco, cvat, dicom_sr, label_studio, labelme, spreadsheet
from ddpm_lmk.data.annotations.image import AnnotatedImage, Annotations, Origin
from ddpm_lmk.data.pack_settings import PackSettings

Reader = Callable[[list[Path], Path, PackSettings], Annotations]
Writer = Callable[[Path, Sequence[AnnotatedImage], Sequence[str]], None]


@dataclass(frozen=True)
class LabelFormat:
    """How labels of a tool are read from files, and written into a folder."""

    suffixes: frozenset[str] | None  # of its label files; None: any
    origin: Origin
    read: Reader  # the files, the folder they are in, the settings of the packing
    write: Writer | None  # None: of predictions, `predict` writes more than this
    pictures: str = "images"  # where its pictures are in the folder that is written
    find_images: Callable[[Annotations, Path], Annotations] | None = None  # where they are named by no path


_JSON = frozenset({".json"})

LABEL_FORMATS: dict[str, LabelFormat] = {
    "coco": LabelFormat(_JSON, coco.ORIGIN, lambda files, root, want: coco.read_coco(files), coco.write_coco),
    "labelme": LabelFormat(
        _JSON,
        labelme.ORIGIN,
        lambda files, root, want: labelme.read_labelme(files, root),
        labelme.write_labelme,
        pictures="",
    ),
    "cvat": LabelFormat(
        frozenset({".xml"}), cvat.ORIGIN, lambda files, root, want: cvat.read_cvat(files), cvat.write_cvat
    ),
    "datumaro": LabelFormat(
        _JSON,
        cvat.ORIGIN,
        lambda files, root, want: cvat.read_datumaro(files),
        cvat.write_datumaro,
        pictures="images/default",
    ),
    "label-studio": LabelFormat(
        _JSON,
        label_studio.ORIGIN,
        lambda files, root, want: label_studio.read_label_studio(files, root),
        label_studio.write_label_studio,
    ),
    "spreadsheet": LabelFormat(
        frozenset({".csv", ".tsv", ".txt"}),
        spreadsheet.ORIGIN,
        lambda files, root, want: spreadsheet.read_spreadsheet(files, want.columns),
        spreadsheet.write_spreadsheet,
    ),
    "dicom-sr": LabelFormat(
        None,
        dicom_sr.ORIGIN,
        lambda files, root, want: dicom_sr.read_reports(files, want.frame),
        write=None,
        find_images=dicom_sr.find_images,
    ),
}
