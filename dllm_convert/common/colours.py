"""Colours that people with any colour vision tell apart (Okabe and Ito, 2008)."""

from __future__ import annotations

GREY = "#767676"
"""Of text and axes: contrast above 4 against white and against the Hub's dark page."""


BLUE = "#0072b2"


GREEN = "#009e73"
"""Bluish green of the same palette."""


VERMILION = "#d55e00"
"""Blue and vermilion of Okabe and Ito: apart for every colour vision, 3:1 on white and on dark."""
