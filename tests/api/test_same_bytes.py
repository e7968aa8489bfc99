"""The same bytes wherever a merge is done: here, in parts by hand, on Ray, from and to a store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stores import S3

from acemerge.output.verify import verify
from attacks.merging import Case
from attacks.ray_cluster import cluster_of

# Of the machine, the moment and the place.
_APART = ("created", "seconds", "digest", "run")


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    """Three files, with thresholds over the whole model and a head."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Case(tmp_path, "ties")
    torch.set_num_threads(threads)


@pytest.fixture
def cluster(s3: S3) -> Iterator[Any]:
    """Two nodes, which find the store by their environment."""
    import ray

    with cluster_of(2) as cluster:
        ray.init(cluster.address, log_to_driver=False)
        yield cluster
        ray.shutdown()


def told(manifest: Any) -> Any:
    """All that a manifest says but for times and places."""
    kept = {key: value for key, value in manifest.items() if key not in _APART}
    kept["tensors"] = {name: {**about, "seconds": 0} for name, about in kept["tensors"].items()}
    kept["inputs"] = [entry["files"] for entry in kept["inputs"]]
    kept["outputs"] = {name: sum for name, sum in kept["outputs"].items() if name != "README.md"}  # it names the models
    kept["recipe"] = {key: value for key, value in kept["recipe"].items() if key not in ("base", "experts")}
    return json.loads(json.dumps(kept))


def in_parts(case: Case, out: Any, **options: Any) -> None:
    for number in (3, 1, 2):
        case.merge(out, shard=f"{number}/3", **options)
    case.merge(out, finish=True, **options)


def test_one_manifest_and_the_same_hashes_wherever_a_merge_is_done(case: Case, s3: S3, cluster: Any) -> None:
    here, bucket = case.folder, f"s3://{s3.bucket()}"
    expected = told(verify(here / "reference"))
    assert all(file["tensors"] for files in expected["inputs"] for file in files.values())
    in_parts(case, here / "parts")
    in_parts(case, f"{bucket}/parts")
    case.merge(here / "ray", ray=cluster.address)
    case.base, *case.experts = (s3.put(m, f"{bucket}/{m.name}") for m in (case.base, *case.experts))
    case.merge(f"{bucket}/whole")
    in_parts(case, f"{bucket}/all-parts")
    case.merge(f"{bucket}/all-ray", ray=cluster.address)
    for out in (
        here / "parts",
        here / "ray",
        *(f"{bucket}/{name}" for name in ("parts", "whole", "all-parts", "all-ray")),
    ):
        assert told(verify(out)) == expected, out
    left = [name for name in s3.contents(f"{bucket}/all-ray") if name.startswith(".acemerge")]
    assert left == []
