from lightning_moevlm.tracking.config_diff import Change, changes, flat


def test_flat() -> None:
    tree = {
        "model": {"dim": 8, "router": None, "rate": 1e-3, "name": "null"},
        "callbacks": [{"class_path": "A"}, {"class_path": "B", "init_args": {}}],
        "sizes": [1, 2],
        "on": True,
    }
    assert flat(tree) == {
        "model.dim": "8",
        "model.router": "null",
        "model.rate": "0.001",
        "model.name": "null",
        "callbacks.0.class_path": "A",
        "callbacks.1.class_path": "B",
        "callbacks.1.init_args": "{}",
        "sizes": "[1, 2]",
        "on": "true",
    }


def test_changes() -> None:
    base, now = {"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "5", "d": "4"}
    assert changes(base, now) == {"b": Change("2", "5"), "c": Change("3", None), "d": Change(None, "4")}
    assert changes(now, now) == {}
