"""Sweeps: any verb over checkpoints, contrasts and runs, in this process, on all its cores, or on a cluster.

Serial by default; `workers=N` starts N processes on this machine (a dask LocalCluster); `scheduler=` uses a dask
cluster that is running, by its address or its scheduler file. On SLURM, by dask's own commands, from a folder that
all nodes see, with this package installed where they run:

    sbatch -c 1  --wrap "dask scheduler --scheduler-file scheduler.json"
    sbatch -n 64 -c 1 --wrap "srun dask worker --scheduler-file scheduler.json --nthreads 1"
    dynamics sweep RUN --out FOLDER --scheduler scheduler.json

Workers may come and go; what one was doing when it died is done again by another. `dask_jobqueue.SLURMCluster` is
the same from Python: `dy.sweep(..., scheduler=cluster)`. A script of one's own that asks for workers must guard its
calls with `if __name__ == "__main__":`, as wherever Python starts processes.
"""

from dynamics.sweeps.accounts import account as account
from dynamics.sweeps.accounts import estimate_account as estimate_account
from dynamics.sweeps.accounts import of_evaluation as of_evaluation
from dynamics.sweeps.errors import SweepError as SweepError
from dynamics.sweeps.estimates import Estimate as Estimate
from dynamics.sweeps.estimates import duration as duration
from dynamics.sweeps.estimates import estimate as estimate
from dynamics.sweeps.estimates import peak_megabytes as peak_megabytes
from dynamics.sweeps.planning import Plan as Plan
from dynamics.sweeps.planning import as_stored as as_stored
from dynamics.sweeps.planning import of_config as of_config
from dynamics.sweeps.planning import plan as plan
from dynamics.sweeps.running import run as run
from dynamics.sweeps.running import sweep as sweep
