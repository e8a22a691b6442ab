"""Sites: named parts of a model whose gradient, update or backward signal is exchanged.

A site is a value; a list of sites is patched one by one and never as a union, so sites may overlap.
"""

from dynamics.sites.any_module import everything as everything
from dynamics.sites.any_module import matching as matching
from dynamics.sites.any_module import parameters as parameters
from dynamics.sites.edges import Path as Path
from dynamics.sites.edges import outside as outside
from dynamics.sites.edges import paths as paths
from dynamics.sites.edges import together as together
from dynamics.sites.fine import neurons as neurons
from dynamics.sites.fine import rows as rows
from dynamics.sites.low_rank import adapters as adapters
from dynamics.sites.outputs import activations as activations
from dynamics.sites.outputs import at_positions as at_positions
from dynamics.sites.outputs import check_outputs as check_outputs
from dynamics.sites.outputs import hooks as hooks
from dynamics.sites.placebos import placebo as placebo
from dynamics.sites.site import Site as Site
from dynamics.sites.site import SiteError as SiteError
from dynamics.sites.site import check as check
from dynamics.sites.site import check_whole as check_whole
from dynamics.sites.transformers import LEVELS as LEVELS
from dynamics.sites.transformers import circuits as circuits
from dynamics.sites.transformers import components as components
from dynamics.sites.transformers import heads as heads
from dynamics.sites.transformers import layers as layers
from dynamics.sites.transformers import matrices as matrices
from dynamics.sites.transformers import up_to_layer as up_to_layer
from dynamics.sites.unions import complement as complement
from dynamics.sites.unions import union as union
