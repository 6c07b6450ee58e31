"""Speed of the camera renderer and the question writer, on one core.

python benchmarks/bench_rendering.py --root DIR --output benchmarks/results/rendering.json

DIR holds a data set in NAVSIM's layout (for instance of ``python -m navsim_ext.synthetic.build``). Each figure is the
mean over ``--scenes`` scenes, least of ``--repeats`` rounds; maps are loaded and their ground is derived before.
Baseline: drawing at the final size without smoothing would be the floor of this method; it is measured beside.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.environment import report, row
from navsim_ext.maps.vector_map import VectorMap
from navsim_ext.questions.write import scene_records
from navsim_ext.readers import SceneFilter, open_source
from navsim_ext.rendering import renderer
from navsim_ext.rendering.renderer import render_scene
from navsim_ext.scene import CAMERAS, Scene

SIZE = (960, 540)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="data set in NAVSIM's layout")
    parser.add_argument("--split", default="trainval")
    parser.add_argument("--scenes", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", help="benchmarks/results/<name>.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source = open_source(arguments.root, arguments.split, scene_filter=SceneFilter(max_scenes=arguments.scenes * 8))
    scenes = [scene for _, found in source.logs() for scene in found][::8]
    pairs = [(scene, source.map_for(scene)) for scene in scenes]
    rows = measure(pairs, arguments.repeats)
    report(
        "Camera renderer and questions", rows, baseline="the same drawing without smoothing", output=arguments.output
    )


def measure(pairs: list[tuple[Scene, VectorMap]], repeats: int) -> list[dict]:
    for scene, vector_map in pairs:
        render_scene(scene, vector_map, size=SIZE)
    objects = sum(len(scene.annotations[scene.now].names) for scene, _ in pairs) / len(pairs)
    picture_ms = 1e3 * mean_s(lambda scene, m: render_scene(scene, m, size=SIZE), pairs, repeats)
    jpeg_ms = 1e3 * mean_s(lambda scene, m: jpeg(render_scene(scene, m, size=SIZE)), pairs, repeats)
    ring_ms = 1e3 * mean_s(lambda scene, m: [render_scene(scene, m, name, SIZE) for name in CAMERAS], pairs, 1)
    small_ms = 1e3 * mean_s(lambda scene, m: render_scene(scene, m, size=(480, 270)), pairs, repeats)
    questions_ms = 1e3 * mean_s(lambda scene, m: scene_records(scene, m, SIZE), pairs, repeats)
    smoothing = renderer.SUPERSAMPLE
    renderer.SUPERSAMPLE = 1
    rough_ms = 1e3 * mean_s(lambda scene, m: render_scene(scene, m, size=SIZE), pairs, repeats)
    renderer.SUPERSAMPLE = smoothing
    return [
        row("annotated objects of a scene, mean", round(objects, 1), ""),
        row("front camera 960x540", picture_ms, "ms", "<= 100"),
        row("front camera 960x540 without smoothing (baseline)", rough_ms, "ms"),
        row("front camera 960x540 with JPEG encoding", jpeg_ms, "ms", "<= 125"),
        row("front camera 480x270", small_ms, "ms"),
        row("all eight cameras 960x540", ring_ms, "ms"),
        row("all questions of a scene", questions_ms, "ms"),
    ]


def mean_s(work: Callable[[Scene, VectorMap], object], pairs: list[tuple[Scene, VectorMap]], repeats: int) -> float:
    """Seconds a scene: least over the repeats of the mean over the scenes."""
    rounds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for scene, vector_map in pairs:
            work(scene, vector_map)
        rounds.append((time.perf_counter() - start) / len(pairs))
    return min(rounds)


def jpeg(picture) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=90)
    return stream.getvalue()


if __name__ == "__main__":
    main()
