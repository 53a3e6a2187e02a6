import pytest

from mdm import sources


def test_table_knows_the_layouts_and_names_them():
    assert sources.get("journeydb").SPLITS == ("train", "valid", "test")
    with pytest.raises(ValueError, match="'laion'; choose one of imagenet, journeydb, ultra"):
        sources.get("laion")


def test_all_thirteen_layouts_are_readers():
    assert len(sources.READERS) == 13
    for name, reader in sources.READERS.items():
        assert name == reader.SOURCE
        assert len(set(reader.SPLITS)) == len(reader.SPLITS) >= 2


def test_datasets_flag(tmp_path):
    odd = tmp_path / "a,b=c, d"
    odd.mkdir()
    pairs = [("imagenet", odd), ("ultrachat", tmp_path), ("journeydb", odd)]
    items = [f"{name}={folder}" for name, folder in pairs]
    assert sources.parse_datasets(items) == pairs
    assert sources.parse_datasets([f"{items[0]},{items[1]}", items[2]]) == pairs
    assert sources.parse_datasets([f"imagenet={odd.as_uri()}"]) == pairs[:1]
    for wrong in ("", "imagenet", "imagenet=", f"={tmp_path}"):
        with pytest.raises(ValueError, match="is not name=folder"):
            sources.parse_datasets([wrong])
    with pytest.raises(ValueError, match="no data set is given"):
        sources.parse_datasets([])
    with pytest.raises(ValueError, match=r"no folder .*; give several data sets by repeating"):
        sources.parse_datasets([f"imagenet={tmp_path},{tmp_path}"])
