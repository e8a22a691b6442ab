"""Names that sites and results share: the coordinates of every site, and the level of placebos."""

SITE_COORDS: dict[str, int | str] = {"layer": -1, "head": -1, "component": "", "level": ""}
"""The coordinates every site has, and their values where a site has none."""

PLACEBO = "placebo"
"""The level of sites that only show what a site's size would do by itself."""
