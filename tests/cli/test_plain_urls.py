"""Training on tars without a manifest from the command line: a list, a map by its class path, exporting."""

from collections.abc import Callable
from pathlib import Path

from tests.small_run import SMALL, budget

URLS = '--data.urls=["data/shards/scenes/train-00000{0..1}.tar", "data/shards/scenes/train-000002.tar"]'
PLAIN = ("--data.root=null", URLS, "--data.webdataset.decode=pil", "--data.webdataset.map=tests.data.plain.maps.Turned")


def test_tars_train_and_are_exported_with_their_tokenizer(moevlm: Callable[..., str], workplace: Path) -> None:
    moevlm("fit", *SMALL, *budget(1), *PLAIN, "--data.webdataset.map.times=2")
    (checkpoint,) = workplace.glob("runs/**/last.ckpt")
    moevlm("export", str(checkpoint), "--out", "exported")
    assert (workplace / "exported/tokenizer.json").is_file()
