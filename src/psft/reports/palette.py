"""Colours told apart by eyes of every kind, at least 3 : 1 against the page (WCAG 2.2, 1.4.11), light and dark.

Never the only sign: each setting has its dash and marker, too.
"""

COLOURS = ("#0072b2", "#d55e00", "#007a5a", "#aa4499", "#7a6a00", "#332288", "#882255", "#555555")
"""On white. Blue, vermilion and green after Okabe and Ito, purple, indigo and wine after Paul Tol, darkened where 3 : 1
asked for it."""
DARK_COLOURS = ("#56b4e9", "#f0884a", "#2fc79a", "#e08ad0", "#d3c34a", "#9f98f5", "#ea84a6", "#b8b8b8")
"""The same hues on the dark page."""
PAGE, DARK_PAGE = "#ffffff", "#15181d"


def contrast(a: str, b: str) -> float:
    """Contrast ratio of two colours `#rrggbb`, 1 to 21, as WCAG defines it."""
    light, dark = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
