"""Results: labelled xarray Datasets, their files, and where they come from."""

from dynamics.results.datasets import DIMS as DIMS
from dynamics.results.datasets import PLACEBO as PLACEBO
from dynamics.results.datasets import REFERENCES as REFERENCES
from dynamics.results.datasets import SITE_COORDS as SITE_COORDS
from dynamics.results.datasets import account as account
from dynamics.results.datasets import attributions as attributions
from dynamics.results.datasets import concat as concat
from dynamics.results.datasets import coordinates as coordinates
from dynamics.results.datasets import difference as difference
from dynamics.results.datasets import effects as effects
from dynamics.results.datasets import folded as folded
from dynamics.results.datasets import is_account as is_account
from dynamics.results.datasets import joined as joined
from dynamics.results.datasets import tidy as tidy
from dynamics.results.datasets import units as units
from dynamics.results.files import ResultsError as ResultsError
from dynamics.results.files import load as load
from dynamics.results.files import save as save
from dynamics.results.files import verify as verify
from dynamics.results.provenance_json import provenance as provenance
