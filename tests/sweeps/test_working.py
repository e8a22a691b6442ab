"""Workers on this machine are reached from this machine alone."""

import psutil
import pytest

from dynamics.sweeps import working


def listening() -> set[str]:
    """The addresses at which this process and its children wait for others."""
    here = psutil.Process()
    processes = [here, *here.children(recursive=True)]
    found = (c for process in processes for c in process.net_connections("inet"))
    return {c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN}


@pytest.mark.slow
def test_a_local_cluster_listens_on_the_loopback_interface_alone():
    with working.local(1) as client:
        client.wait_for_workers(1)
        assert listening() == {"127.0.0.1"}
