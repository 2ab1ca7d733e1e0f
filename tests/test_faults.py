"""No fault of a machine costs a run more than the steps since its last checkpoint."""

import fault_campaign


def test_no_run_is_lost():
    lines = []
    lost = fault_campaign.campaign(short=True, show=lines.append)
    assert not lost, lost
    assert "16 faults, 16 struck, 0 runs lost" in lines[-1], lines
