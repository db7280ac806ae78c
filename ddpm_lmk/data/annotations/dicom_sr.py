"""Landmarks in DICOM structured reports: names as codes, and points of any TID 1500 report.

A landmark is a code of the private scheme 99DDPMLMK (PS3.16 8.2): its value is a hash of the name, since names are text
of users and values have 16 characters of ASCII; its meaning is the name, as far as 64 characters go. The whole name is
the Tracking Identifier of the group.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydicom.sr.coding import Code

SCHEME = "99DDPMLMK"
_MEANINGS = {
    "spread": "Standard deviation of the position",
    "radius": "Radius around the true position",
    "coverage": "Probability of the radius",
    "position": "Position",
    "not found": "No position found in the picture",
}
_UNITS = {"pixels": ("{pixels}", "pixels"), "mm": ("mm", "millimeter"), "%": ("%", "percent")}  # UCUM
_LONGEST_MEANING = 64  # characters of LO


def code(word: str) -> Code:
    """The code of a unit, of a measurement, or of an answer."""
    from pydicom.sr.coding import Code

    if word in _UNITS:
        return Code(_UNITS[word][0], "UCUM", _UNITS[word][1])
    return Code(word.upper().replace(" ", "_"), SCHEME, _MEANINGS[word])


def landmark_code(name: str) -> Code:
    """The code of a landmark."""
    from pydicom.sr.coding import Code

    value = "L" + hashlib.sha256(name.encode()).hexdigest()[:15]
    return Code(value, SCHEME, name.replace("\\", "/")[:_LONGEST_MEANING])
