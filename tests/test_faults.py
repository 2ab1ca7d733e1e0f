"""No fault of a machine costs a run more than the steps since its last checkpoint."""

import fault_campaign


def test_no_run_is_lost():
    lines = []
    lost = fault_campaign.campaign(short=True, show=lines.append)
    assert not lost, lost
    late = [line for line in lines if "it ended first" in line]
    assert "16 faults" in lines[-1] and all("any moment" in line for line in late), lines
