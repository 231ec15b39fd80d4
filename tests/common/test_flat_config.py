from lightning_moevlm.common.flat_config import Change, find_changes, flatten, unflatten


def test_flat() -> None:
    tree = {
        "model": {"dim": 8, "router": None, "rate": 1e-3, "name": "null"},
        "callbacks": [{"class_path": "A"}, {"class_path": "B", "init_args": {}}],
        "sizes": [1, 2],
        "on": True,
    }
    assert flatten(tree) == {
        "model.dim": "8",
        "model.router": "null",
        "model.rate": "0.001",
        "model.name": '"null"',  # a text, and no null
        "callbacks.0.class_path": "A",
        "callbacks.1.class_path": "B",
        "callbacks.1.init_args": "{}",
        "sizes": "[1, 2]",
        "on": "true",
    }


def test_changes() -> None:
    base, now = {"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "5", "d": "4"}
    assert find_changes(base, now) == {"b": Change("2", "5"), "c": Change("3", None), "d": Change(None, "4")}
    assert find_changes(now, now) == {}


def test_a_text_that_reads_as_json_comes_back_as_a_text() -> None:
    tree = {
        "texts": {"number": "32", "null": "null", "list": "[1]", "quoted": '"a"', "float": "1e5", "plain": "32-true"}
    }
    spelled = flatten(tree)
    assert (spelled["texts.number"], spelled["texts.plain"]) == ('"32"', "32-true")
    assert unflatten(spelled) == tree
    assert unflatten(flatten({"a": {"number": 32, "none": None, "list": [1, "x"]}})) == {
        "a": {"number": 32, "none": None, "list": [1, "x"]}
    }
