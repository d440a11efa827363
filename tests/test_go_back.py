"""The way back to a run's earlier pictures: what the page is told. (tests/browser/check_go_back.py clicks on them.)"""

import pytest


def test_each_picture_with_where_it_leads(flux, tmp_path):
    go_back, folder = flux.pack.nodes.go_back, flux.pack.nodes.runs.runs_folder() / "my style"
    (folder / "held_out").mkdir(parents=True)
    for name in ("000000", "000010", "000020", "000100", "12 copy"):
        (folder / "held_out" / f"{name}.png").touch()
    taken = flux.pack.nodes.runs.runs_folder() / "my style from 10"
    taken.mkdir()
    (taken / "state.pt").touch()

    def kept(folder, iteration):
        return {10: (10, "10"), 100: (60, "best")}.get(iteration)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(go_back, "way_back", kept)
        found = go_back.pictures("my style")["pictures"]
    assert [(one["iteration"], one["back"], one["choice"], one["name"]) for one in found] == [
        (0, 0, "(nothing)", "my style from 0"),
        (10, 10, "my style @ 10", "my style from 10 2"),
        (20, None, None, None),
        (100, 60, "my style @ best", "my style from 60"),
    ]
    assert found[1]["image"] == {"filename": "000010.png", "subfolder": "treerpo/my style/held_out", "type": "output"}
    assert go_back.pictures("never run") == {"pictures": []}
    for name in ("../elsewhere", "", "a/b"):
        with pytest.raises(ValueError, match="run name"):
            go_back.pictures(name)
