"""Every local form of SHARDS, and wrong ways to name shards."""

import os
from pathlib import Path

import pytest

from vitscore.errors import ClassError, DataError, UsageError
from vitscore.shards.locate import locate
from vitscore.shards.shard import corpus_names
from vitscore.shards.sidefiles import read_classes


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*names: str, content: str = "x") -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)


def names(*specs: str, split: str = "test") -> list[str]:
    corpus = locate(specs, split=split)
    assert [shard.ordinal for shard in corpus.shards] == list(range(len(corpus.shards)))
    return [shard.name for shard in corpus.shards]


def test_paths_globs_and_folders_sort_naturally(here: Path) -> None:
    touch("d/s-10.tar", "d/s-2.tar", "d/s-1.tar", "d/notes.md", "d/.hidden.tar", "d/sub/s-3.tar")
    in_order = ["d/s-1.tar", "d/s-2.tar", "d/s-10.tar"]
    assert names("d") == names("d/*") == names("d/s-*.tar") == in_order
    assert names("d/") == in_order
    assert names("d/s-2.tar", "d/s-1.tar") == ["d/s-2.tar", "d/s-1.tar"]
    assert names("d/**/s-[13].tar") == ["d/s-1.tar", "d/sub/s-3.tar"]


def test_braces_expand_and_missing_shards_stay_listed(here: Path) -> None:
    touch("s-000.tar", "s-002.tar")
    corpus = locate(["s-{000..002}.tar"])
    assert [(shard.name, shard.num_bytes) for shard in corpus.shards] == [
        ("s-000.tar", 1),
        ("s-001.tar", None),
        ("s-002.tar", 1),
    ]
    touch("a/1.tar", "b/1.tar")
    assert names("{a,b}/*.tar") == ["a/1.tar", "b/1.tar"]


def test_names_that_exist_are_taken_as_they_are(here: Path) -> None:
    touch("s[1]{2}.tar")
    assert names("s[1]{2}.tar") == ["s[1]{2}.tar"]


def test_a_list_names_shards_relative_to_itself(here: Path) -> None:
    touch("lists/a.tar", "lists/sub/b-1.tar", "lists/sub/b-2.tar", "c.tar")
    touch("lists/val.txt", content=f"# shards\n\na.tar\nsub/b-{{1..2}}.tar\n../c.tar\n{here}/lists/z.tar\n")
    corpus = locate(["lists/val.txt"])
    assert [shard.name for shard in corpus.shards] == [
        "a.tar",
        "sub/b-1.tar",
        "sub/b-2.tar",
        "../c.tar",
        f"{here}/lists/z.tar",
    ]
    assert [os.path.exists(shard.path) for shard in corpus.shards] == [True, True, True, True, False]


def test_side_files_lie_beside_the_shards(here: Path) -> None:
    touch("d/1.tar", "d/2.tar")
    touch("d/classes.txt", content="cat\ndog\n")
    touch("d/templates.txt", content="a {c}\n\nthe {}\n")
    for spec in ("d", "d/1.tar", "d/*.tar", "d/{1,2}.tar"):
        corpus = locate([spec])
        assert corpus.classes == ("cat", "dog")
        assert corpus.classes_source == "d/classes.txt"
        assert (corpus.templates, corpus.templates_source) == (("a {c}", "the {}"), "d/templates.txt")


def test_side_files_that_differ_give_no_classes(here: Path) -> None:
    touch("a/1.tar", "b/1.tar")
    touch("a/classes.txt", content="cat\n")
    touch("b/classnames.txt", content="dog\n")
    corpus = locate(["a", "b"])
    assert (corpus.classes, corpus.classes_source) == (None, "a/classes.txt and b/classnames.txt differ")
    touch("b/classnames.txt", content="cat\n")
    assert locate(["a", "b"]).classes == ("cat",)


def benchmark_layout(root: str, num_shards: str = "11") -> None:
    touch(f"{root}/classnames.txt", content="cat\ndog")
    touch(f"{root}/zeroshot_classification_templates.txt", content="a photo of a {c}.\n")
    touch(f"{root}/test/nshards.txt", content=f"{num_shards}\n")
    touch(*(f"{root}/test/{n}.tar" for n in range(11)))


def test_clip_benchmarks_layout_is_read(here: Path) -> None:
    benchmark_layout("wds")
    corpus = locate(["wds"])
    assert [shard.name for shard in corpus.shards] == [f"wds/test/{n}.tar" for n in range(11)]
    assert (corpus.classes, corpus.templates) == (("cat", "dog"), ("a photo of a {c}.",))
    assert locate(["wds/test"]).classes == ("cat", "dog")
    with pytest.raises(UsageError, match="no such split: wds - expected test, got train"):
        locate(["wds"], split="train")


def test_clip_benchmarks_layout_lists_missing_shards(here: Path) -> None:
    benchmark_layout("wds", "12")
    assert locate(["wds"]).shards[11].num_bytes is None
    benchmark_layout("wds", "many")
    with pytest.raises(DataError, match="invalid number of shards"):
        locate(["wds"])


def test_demo_is_built_in_and_a_path_with_a_dot_is_not(here: Path) -> None:
    touch("demo/1.tar", "demo-2/1.tar")
    assert names("./demo") == ["./demo/1.tar"]
    with pytest.raises(UsageError, match=r"unknown built-in data set: demo-2 .*write \./demo-2"):
        locate(["demo-2"])


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ("nothing-*.tar", "no shard matches"),
        ("nowhere", "no such shard, folder or list: nowhere"),
        ("nowhere.txt", "no such list"),
        ("empty", "no shards in the folder"),
        ("comments.txt", "no shards in the list"),
        ("s-{1..2.tar", "unbalanced braces"),
        ("ftp://me:secret@host/s.tar?key=1", r"unknown kind of URL: ftp://host/s.tar - "),
        ("tops", "Its subfolder test has some: pass tops/test"),
    ],
)
def test_wrong_names_are_usage_errors(here: Path, spec: str, error: str) -> None:
    Path("empty").mkdir()
    touch("comments.txt", content="# none\n")
    touch("tops/test/1.tar")
    with pytest.raises(UsageError, match=error):
        locate([spec])


@pytest.mark.parametrize("specs", [["d/1.tar", "d/1.tar"], ["d", "./d/1.tar"], ["d/{1,1}.tar"]])
def test_a_shard_listed_twice_is_refused(here: Path, specs: list[str]) -> None:
    touch("d/1.tar")
    with pytest.raises(UsageError, match="shard listed twice"):
        locate(specs)


@pytest.mark.parametrize("file", ["cat/1.jpg", "1.PNG", "cifar-10-batches-bin/test_batch.bin", "deep/er/x.webp"])
def test_the_error_for_a_folder_of_images_names_the_command_to_run(here: Path, file: str) -> None:
    touch(f"my photos/{file}")
    line = "vitscore shards make 'my photos' -o 'my photos-shards'"
    with pytest.raises(UsageError, match=line):
        locate(["my photos"])


def test_corpus_names_are_the_same_wherever_the_corpus_lies(here: Path) -> None:
    touch("x/a/1.tar", "x/b/1.tar", "elsewhere/deep/a/1.tar", "elsewhere/deep/b/1.tar")
    assert corpus_names(locate(["x/a", "x/b"]).shards) == ["a/1.tar", "b/1.tar"]
    assert corpus_names(locate(["elsewhere/deep/{a,b}/1.tar"]).shards) == ["a/1.tar", "b/1.tar"]
    assert corpus_names(locate(["x/a"]).shards) == ["1.tar"]


def test_class_names_keep_their_line_as_id(here: Path) -> None:
    touch("c.txt", content=" cat \r\nline\u2028sep\n\n\n")
    assert read_classes("c.txt") == ("cat", "line\u2028sep")
    touch("c.json", content='["cat", "dog"]')
    assert read_classes("c.json") == ("cat", "dog")
    touch("c.txt", content="cat\n\ndog\n")
    with pytest.raises(ClassError, match=r"c.txt, line 2"):
        read_classes("c.txt")
