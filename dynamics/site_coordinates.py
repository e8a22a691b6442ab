"""Names that sites and results share: the coordinates of every site, and the level of placebos."""

SITE_COORDS: dict[str, int | str] = {"layer": -1, "head": -1, "component": "", "level": ""}
"""The coordinates every site has, and their values where a site has none."""

PLACEBO = "placebo"
"""The level of sites that only show what a site's size would do by itself."""

NESTED = "up_to_layer"
"""The level of sites each of which holds the one before."""

MEANINGS: dict[str, str] = {
    "layer": "layer; -1: the site has none",
    "head": "head; -1: the site has none",
    "level": "kind of site, such as heads",
    "component": "part of the model",
}
"""What the coordinates of every site are, said in each result."""
