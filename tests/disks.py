"""Small file systems of their own, for tests of full disks."""

import contextlib
import os
import subprocess

import pytest


@contextlib.contextmanager
def small_file_system(place, megabytes):
    """One of so many megabytes, in memory, at `place`; without root the test is skipped."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system takes root")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)
