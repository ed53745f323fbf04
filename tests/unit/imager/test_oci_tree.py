"""Layers merge as the image specification says, whatever the order of a layer's entries.

The tables are the examples of the OCI image-spec (layer.md) and the cases in which engines differ.
"""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Sequence

import pytest

from services.common.errors import Corrupt, Exhausted, InvalidInput
from services.imager.layers import LayerMerger, LayerSource
from services.imager.limits import Limits
from services.imager.tree import Kind, Node, Tree
from tests.imager_images import Item, directory, hardlink, make_tar, sha256, symlink


class Nowhere:
    """A sink that only counts blocks."""

    def __init__(self) -> None:
        self.next = 1

    def store(self, chunks: object, length: int) -> int:
        """Consume the data."""
        for _ in chunks:  # type: ignore[attr-defined]
            pass
        return self._reserve(length)

    def store_piece(self, data: bytes | memoryview) -> int:
        """Drop the data."""
        return self._reserve(len(data))

    def _reserve(self, length: int) -> int:
        first = self.next
        self.next += -(-length // 4096)
        return first


def merge(*layers: Sequence[Item], limits: Limits | None = None) -> Tree:
    """The tree of these layers."""

    merger = LayerMerger(Nowhere(), limits or Limits())
    for items in layers:
        tar = make_tar(items)
        merger.apply(
            LayerSource(digest=sha256(tar), size=len(tar), diff_id=sha256(tar), blob=io.BytesIO(tar))
        )
    return merger.tree


def paths(tree: Tree) -> set[str]:
    """All paths, directories with a slash at the end."""
    found: set[str] = set()
    stack: list[tuple[str, Node]] = [("", tree.root)]
    while stack:
        prefix, node = stack.pop()
        for name, child in node.children.items():
            path = prefix + name.decode()
            if child.kind is Kind.DIRECTORY:
                found.add(path + "/")
                stack.append((path + "/", child))
            else:
                found.add(path)
    return found


def at(tree: Tree, path: str) -> Node:
    """The node at a path without symbolic links."""
    node = tree.root
    for part in path.split("/"):
        node = node.children[part.encode()]
    return node


def f(name: str, data: bytes = b"", **more: object) -> Item:
    return Item(name=name.encode(), data=data, **more)  # type: ignore[arg-type]


def d(name: str, **more: object) -> Item:
    return directory(name.encode(), **more)


UNCHANGED = {"a/", "a/b/", "a/b/c/", "a/b/c/bar", "a/top", "keep"}
REPLACED = {"a/", "a/b/", "a/b/c/", "a/b/c/foo", "keep"}
LOWER = [d("a"), d("a/b"), d("a/b/c"), f("a/b/c/bar"), f("a/top"), f("keep")]


@pytest.mark.parametrize(
    ("upper", "expected"),
    [
        # layer.md, "Whiteouts": an explicit whiteout, and an opaque one, give the same.
        ([d("a"), f("a/.wh.b"), d("a/b"), d("a/b/c"), f("a/b/c/foo")], REPLACED | {"a/top"}),
        ([d("a"), f("a/.wh..wh..opq"), d("a/b"), d("a/b/c"), f("a/b/c/foo")], REPLACED),
        ([f(".wh.a")], {"keep"}),
        ([f("a/b/.wh.c")], {"a/", "a/b/", "a/top", "keep"}),
        ([f("a/.wh..wh..opq")], {"a/", "keep"}),
        ([f(".wh..wh..opq"), f("only")], {"only"}),
        ([f("a/b/.wh..wh..opq"), f("a/.wh..wh..opq")], {"a/", "keep"}),
        ([f("a/b/c/new"), f("a/.wh..wh..opq")], {"a/", "a/b/", "a/b/c/", "a/b/c/new", "keep"}),
        ([f("a/b/c/new"), f(".wh.a")], {"a/", "a/b/", "a/b/c/", "a/b/c/new", "keep"}),
        ([f("keep", b"new"), f(".wh.keep")], UNCHANGED),
        ([f(".wh.absent"), f("absent/.wh.x"), f("absent/.wh..wh..opq")], UNCHANGED),
        ([f("keep/.wh.x")], UNCHANGED),
        ([f(".wh..wh.plnk/1.2"), f(".wh..wh.aufs")], UNCHANGED),
        ([f("a")], {"a", "keep"}),
        ([d("keep"), f("keep/x")], UNCHANGED - {"keep"} | {"keep/", "keep/x"}),
        ([f("./a/./b/x"), f("/a/b/y")], UNCHANGED | {"a/b/x", "a/b/y"}),
    ],
)  # fmt: skip
def test_whiteouts_hide_what_lower_layers_brought(upper: list[Item], expected: set[str]) -> None:
    assert paths(merge(LOWER, upper)) == expected


@pytest.mark.parametrize(
    "upper",
    [
        [f("a/b/c/new"), f("a/.wh..wh..opq"), f("a/other")],
        [f("a/b/new"), f(".wh.a"), f("a/b/c/x")],
        [f("a/b/.wh..wh..opq"), f("a/.wh..wh..opq"), f("a/b/x"), f("a/b/c/y")],
        [f("keep", b"new"), f(".wh.keep"), f(".wh..wh..opq")],
        [f("a/b/.wh.c"), f("a/b/c/d/e"), f("a/.wh.b")],
    ],
)
def test_the_order_of_entries_and_markers_in_a_layer_does_not_matter(upper: list[Item]) -> None:
    results = []
    for order in itertools.permutations(upper):
        tree = merge(LOWER, order)
        modes = {(path, at(tree, path.rstrip("/")).mtime_ns) for path in paths(tree)}
        results.append(modes)
    assert all(result == results[0] for result in results)


def test_a_marker_hides_lower_layers_only_once_and_the_next_layer_starts_anew() -> None:
    tree = merge(LOWER, [f("a/.wh..wh..opq"), f("a/x")], [f("a/.wh.x"), f("a/y")], [f(".wh.a")])
    assert paths(tree) == {"keep"}


def test_a_directory_over_a_directory_keeps_contents_and_takes_metadata() -> None:
    tree = merge(LOWER, [d("a", mode=0o700, uid=5, xattrs={b"user.x": b"1"})])
    assert "a/b/c/bar" in paths(tree)
    assert (at(tree, "a").mode, at(tree, "a").uid, at(tree, "a").xattrs) == (0o700, 5, {b"user.x": b"1"})


def test_a_directory_that_only_lost_contents_imply_is_as_if_made_new() -> None:
    tree = merge([d("a", mode=0o700, uid=7), f("a/old")], [f(".wh.a"), f("a/new")])
    assert paths(tree) == {"a/", "a/new"}
    assert (at(tree, "a").mode, at(tree, "a").uid, at(tree, "a").mtime_ns) == (0o755, 0, 0)


def test_parents_are_resolved_inside_the_tree() -> None:
    lower = [
        d("usr"),
        d("usr/lib"),
        symlink(b"lib", b"usr/lib"),
        symlink(b"abs", b"/usr/lib"),
        symlink(b"up", b"../../../usr"),
        symlink(b"dangling", b"made/here"),
        symlink(b"two", b"lib"),
    ]
    tree = merge(lower, [f("lib/a"), f("abs/b"), f("up/c"), f("dangling/d"), f("two/e")])
    assert {"usr/lib/a", "usr/lib/b", "usr/c", "made/here/d", "usr/lib/e"} <= paths(tree)
    assert at(tree, "lib").kind is Kind.SYMLINK


def test_paths_are_resolved_anew_when_what_they_lead_through_has_changed() -> None:
    """The tree remembers where paths lead; each of these ends that."""
    first = [directory(b"a"), directory(b"b"), symlink(b"s", b"a"), Item(name=b"s/1")]
    assert paths(merge([*first, symlink(b"s", b"b"), Item(name=b"s/2")])) == {"a/", "a/1", "b/", "b/2", "s"}
    assert paths(merge([*first, directory(b"s"), Item(name=b"s/2")])) == {"a/", "a/1", "b/", "s/", "s/2"}
    assert paths(merge(first, [Item(name=b".wh.s"), Item(name=b"s/2")])) == {"a/", "a/1", "b/", "s/", "s/2"}
    moved = [directory(b"d"), Item(name=b"d/1"), symlink(b"d", b"b"), Item(name=b"d/2")]
    assert paths(merge([directory(b"b"), *moved])) == {"b/", "b/2", "d"}
    odd = [directory(b"x"), Item(name=b"x/1"), directory(b"x//"), directory(b"x/."), Item(name=b"x/2")]
    assert paths(merge(odd)) == {"x/", "x/1", "x/2"}


def test_whiteouts_go_through_symbolic_links_too() -> None:
    lower = [d("usr"), d("usr/lib"), f("usr/lib/x"), symlink(b"lib", b"usr/lib")]
    assert "usr/lib/x" not in paths(merge(lower, [f("lib/.wh.x")]))
    assert paths(merge(lower, [f(".wh.lib")])) == {"usr/", "usr/lib/", "usr/lib/x"}


def test_a_directory_entry_replaces_a_symbolic_link_as_engines_do() -> None:
    tree = merge([d("usr"), f("usr/x"), symlink(b"lib", b"usr")], [d("lib"), f("lib/y")])
    assert paths(tree) == {"usr/", "usr/x", "lib/", "lib/y"}


def test_hard_links_share_a_node_across_layers_and_survive_the_first_name() -> None:
    tree = merge([f("a", b"data"), f("b", b"other")], [hardlink(b"link", b"a")], [f(".wh.a")])
    assert paths(tree) == {"link", "b"}
    assert at(tree, "link").size == 4
    tree = merge([f("a", b"data")], [hardlink(b"l1", b"a"), hardlink(b"l2", b"./l1")], [f("a", b"new!!")])
    assert at(tree, "l1") is at(tree, "l2") is not at(tree, "a")


def test_hard_links_may_come_before_their_target() -> None:
    tree = merge([hardlink(b"c", b"b"), hardlink(b"b", b"a"), f("a", b"x")])
    assert at(tree, "a") is at(tree, "b") is at(tree, "c")


@pytest.mark.parametrize(
    ("items", "why"),
    [
        ([f("../x")], r"\.\."),
        ([f("a/../x")], r"\.\."),
        ([f("..")], r"\.\."),
        ([f(".wh...")], "names no file"),
        ([f("a/.wh.")], "names no file"),
        ([f("a/.wh..")], "names no file"),
        ([f(".wh.a/b")], "begins with .wh."),
        ([f("a"), f("a/b")], "not a directory"),
        ([Item(name=b"f", kind=tarfile.FIFOTYPE), f("f/b")], "not a directory"),
        ([hardlink(b"l", b"../../etc/passwd")], r"\.\."),
        ([hardlink(b"l", b"/etc/passwd")], "does not exist"),
        ([hardlink(b"l", b"l")], "does not exist"),
        ([hardlink(b"a", b"b"), hardlink(b"b", b"a")], "does not exist"),
        ([d("dir"), hardlink(b"l", b"dir")], "directory"),
        ([hardlink(b"l", b".")], "root"),
        ([symlink(b"a", b"b"), symlink(b"b", b"a"), f("a/x")], "more than 40 symbolic links"),
        ([symlink(b"a", b"a"), f("a/x")], "more than 40 symbolic links"),
        ([f("n" * 256)], "256 bytes"),
        ([f(".")], "root"),
        ([symlink(b"s", b"x" * 4096)], "target of 4096"),
        ([Item(name=b"c", kind=tarfile.CHRTYPE, device=(5000, 0))], "device 5000:0"),
        ([symlink(b"a", b"x" * 256), f("a/y")], "256 bytes"),
    ],
)  # fmt: skip
def test_what_breaks_a_rule_is_refused_and_the_message_names_layer_and_entry(
    items: list[Item], why: str
) -> None:
    with pytest.raises((InvalidInput, Corrupt), match=why) as caught:
        merge(items)
    assert caught.value.metadata["digest"].startswith("sha256:")
    assert "layer sha256:" in caught.value.message


def test_a_symbolic_link_at_the_end_is_never_followed() -> None:
    tree = merge([symlink(b"passwd", b"/etc/passwd")], [f("passwd", b"own")])
    assert at(tree, "passwd").kind is Kind.FILE
    tree = merge([f("target", b"x"), symlink(b"s", b"target"), hardlink(b"l", b"s")])
    assert at(tree, "l").kind is Kind.SYMLINK


def test_a_long_chain_of_forward_hard_links_does_not_take_forever() -> None:
    links = [hardlink(b"l%d" % i, b"l%d" % (i + 1)) for i in range(5000)]
    with pytest.raises(InvalidInput, match="does not exist"):
        merge([*links, Item(name=b"end")])
    with pytest.raises(InvalidInput, match="does not exist"):
        merge(links)


def test_many_opaque_markers_cost_no_more_than_the_tree() -> None:
    deep = [d("/".join(["d"] * i)) for i in range(1, 300)]
    markers = [f("/".join(["d"] * i) + "/.wh..wh..opq") for i in range(299, 0, -1)]
    assert len(paths(merge(deep, markers * 3))) == 1


def test_paths_through_endless_symbolic_links_end() -> None:
    """Forty links of a thousand components each, walked for every entry."""
    links = [symlink(b"l0", b"./" * 1000 + b".")]
    links += [symlink(b"l%d" % i, b"./" * 1000 + b"l%d" % (i - 1)) for i in range(1, 39)]
    with pytest.raises(InvalidInput, match="too many symbolic links"):
        merge([*links, *(f(f"l38/{i}/x") for i in range(2000))])


def test_names_and_attributes_that_would_fill_the_memory_are_refused() -> None:
    items = [f(f"f{i}", xattrs={b"user.a": b"x" * 3000}) for i in range(10)]
    with pytest.raises(Exhausted, match="extended attributes"):
        merge(items, limits=Limits(metadata_bytes=20_000))
