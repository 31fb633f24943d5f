"""The log: what is shown, and where."""

import subprocess
import sys

from jaxtax.hosts.process import is_first_process


def test_the_log_shows_our_news_and_only_the_warnings_of_others():
    code = (
        "import logging; from jaxtax.hosts.process import log_to_stderr; log_to_stderr()\n"
        "logging.getLogger('jaxtax.train').info('ours')\n"
        "logging.getLogger('jaxtax.train').debug('details')\n"
        "logging.getLogger('other').info('gossip')\n"
        "logging.getLogger('other').warning('trouble')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert [line.split(" ", 1)[1] for line in done.stderr.splitlines()] == [
        "jaxtax.train: ours",
        "other: trouble",
    ]


def test_a_single_process_is_the_first():
    assert is_first_process()
