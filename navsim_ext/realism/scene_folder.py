"""Where the recorded scenes come from: a store of traffic scenes, or a folder of neutral npz files."""

from __future__ import annotations

from pathlib import Path

from navsim_ext.errors import MissingError
from navsim_ext.fingerprint import digest_file, digest_json
from navsim_ext.traffic.scene import TrafficScene
from navsim_ext.traffic.scene_v1 import read_scene
from navsim_ext.traffic.store import TrafficStore

SCENE_SUFFIX = ".scene.npz"


class SceneFolder:
    """Scenes by name: a traffic store, or files ``NAME.scene.npz``. MissingError where the folder is neither."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._store = TrafficStore(folder) if (self.folder / "fingerprint.json").is_file() else None
        self._files = {path.name.removesuffix(SCENE_SUFFIX): path for path in self.folder.glob(f"*{SCENE_SUFFIX}")}
        if self._store is None and not self._files:
            raise MissingError(f"{folder} is neither a store of traffic scenes nor holds NAME{SCENE_SUFFIX} files")

    @property
    def names(self) -> list[str]:
        return sorted(self._files) if self._store is None else self._store.ids

    def get(self, name: str) -> TrafficScene:
        return read_scene(self._files[name]) if self._store is None else self._store.load(name)

    def identity(self) -> str:
        """Digest of what the scenes are."""
        if self._store is not None:
            return self._store.fingerprint.digest
        return digest_json({name: digest_file(path) for name, path in sorted(self._files.items())})
