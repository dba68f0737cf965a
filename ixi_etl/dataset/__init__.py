"""Define, write, verify, publish, find and remove dataset versions: the manifest, the Zarr store and their metadata."""

__all__ = ["compare", "manifest", "metadata", "prune", "publish", "schema", "selection", "store", "verify", "versions"]
