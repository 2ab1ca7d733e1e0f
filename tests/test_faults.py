"""No fault of a machine costs a run more than the steps since its last checkpoint was due."""

import sys

import fault_campaign
import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_no_run_is_lost():
    faults = [name for name in fault_campaign.FAULTS if name != "rank killed"]  # see tests/test_torchrun.py
    struck, lost = fault_campaign.campaign(1, faults=faults)
    assert not lost and len(struck) >= 10, (struck, lost)
