"""Reading and writing of files: one way of each."""

from .files import atomic_path, cache_root, write_atomically, write_csv_atomically, write_json_atomically

__all__ = ["atomic_path", "cache_root", "write_atomically", "write_csv_atomically", "write_json_atomically"]
