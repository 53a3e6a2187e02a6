import pytest

from mdm import sources


def test_get_returns_a_reader_or_lists_the_choices():
    assert sources.get("journeydb").SPLITS == ("train", "valid", "test")
    with pytest.raises(ValueError, match="'laion'; choose one of imagenet, journeydb, ultra"):
        sources.get("laion")


def test_all_thirteen_data_sets_have_readers():
    assert len(sources.READERS) == 13
    for name, reader in sources.READERS.items():
        assert name == reader.SOURCE
        assert len(set(reader.SPLITS)) == len(reader.SPLITS) >= 2


def test_the_datasets_flag_takes_any_folder_and_reports_mistakes(tmp_path):
    folder = tmp_path / "a,b=c, d"
    folder.mkdir()
    pairs = [("imagenet", folder), ("ultrachat", tmp_path), ("journeydb", folder)]
    items = [f"{name}={root}" for name, root in pairs]
    assert sources.parse_datasets(items) == pairs
    assert sources.parse_datasets([f"{items[0]},{items[1]}", items[2]]) == pairs
    assert sources.parse_datasets([f"imagenet={folder.as_uri()}"]) == pairs[:1]
    for item in ("", "imagenet", "imagenet=", f"={tmp_path}"):
        with pytest.raises(ValueError, match="is not name=folder"):
            sources.parse_datasets([item])
    with pytest.raises(ValueError, match="no data set is given"):
        sources.parse_datasets([])
    with pytest.raises(ValueError, match=r"no folder .*; give several data sets by repeating"):
        sources.parse_datasets([f"imagenet={tmp_path},{tmp_path}"])


def test_an_empty_archive_is_a_split_that_lacks_records(tmp_path):
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(bytes(10240))
    (tmp_path / "LOC_synset_mapping.txt").write_text("n00000000 goldfish\n")
    assert sources.training_splits("imagenet", tmp_path) == ("train",)
    assert sources.held_out_split("imagenet", tmp_path) == ""
