"""Results: labelled xarray Datasets, their files, and where they come from."""

from dynamics.results.combining import concat as concat
from dynamics.results.combining import difference as difference
from dynamics.results.combining import folded as folded
from dynamics.results.combining import joined as joined
from dynamics.results.coordinate_columns import DIMS as DIMS
from dynamics.results.coordinate_columns import REFERENCES as REFERENCES
from dynamics.results.coordinate_columns import coordinates as coordinates
from dynamics.results.datasets import account as account
from dynamics.results.datasets import attributions as attributions
from dynamics.results.datasets import effects as effects
from dynamics.results.files import ResultsError as ResultsError
from dynamics.results.files import files_of as files_of
from dynamics.results.files import load as load
from dynamics.results.files import save as save
from dynamics.results.files import verify as verify
from dynamics.results.provenance_json import provenance as provenance
from dynamics.results.reading import is_account as is_account
from dynamics.results.reading import tidy as tidy
from dynamics.results.reading import units as units
from dynamics.site_coordinates import PLACEBO as PLACEBO
from dynamics.site_coordinates import SITE_COORDS as SITE_COORDS
