"""Google Cloud Storage by the same code as S3: what must be new, versions, uploads in parts."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import PlainModel
from hub_server import contents
from stores import S3

import acemerge
from acemerge.checkpoints import store_objects
from acemerge.errors import UsageError, WriteError
from acemerge.output.verify import verify

OPTIONS = {"max_shard_size": "1KB", "method": "average"}


def test_a_merge_from_gs_to_gs(google: S3, plain: PlainModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_objects, "PART", 600)  # so that shards go up in parts
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)
    bucket = google.bucket()
    base, experts = plain.save()
    models = [base, *experts]
    there = [google.put(model, f"s3://{bucket}/{model.name}").replace("s3:", "gs:") for model in models]
    acemerge.merge(models[0], models[1:], out=tmp_path / "local", **OPTIONS)
    out = f"gs://{bucket}/out"
    acemerge.merge(there[0], there[1:], out=out, **OPTIONS)
    verify(out)
    found, local = google.contents(f"s3://{bucket}/out"), contents(tmp_path / "local")
    weights = [name for name in local if name.startswith("model")]
    assert {name: found[name] for name in weights} == {name: local[name] for name in weights}
    assert found.keys() == local.keys()
    with pytest.raises(UsageError, match="holds a finished merge"):
        acemerge.merge(there[0], there[1:], out=out, **OPTIONS)


def test_the_manifest_must_be_new(google: S3, plain: PlainModel) -> None:
    """Another run has finished since this one began."""
    base, experts = plain.save()
    bucket = google.bucket()

    def overtaken(_: object) -> None:
        google.client.put_object(Bucket=bucket, Key="out/acemerge.json", Body=b"of another run")

    with pytest.raises(WriteError, match="another run has finished here"):
        acemerge.merge(base, experts, out=f"gs://{bucket}/out", on_progress=overtaken, **OPTIONS)
    assert google.contents(f"s3://{bucket}/out")["acemerge.json"] == b"of another run"
    with pytest.raises(WriteError, match=r"there is no such bucket \(NoSuchBucket\)"):
        acemerge.merge(base, experts, out="gs://nowhere-at-all/out", **OPTIONS)
