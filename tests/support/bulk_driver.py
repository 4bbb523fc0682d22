"""A slow bulk job in a process of its own, to be killed.

python tests/support/bulk_driver.py INPUT OUTPUT LOG
"""

import sys

from bulk_works import ManyUnits

from commandline import run_job
from raptide.bulk import BulkSettings, OutputFolder, find_sources, run_bulk
from raptide.cluster import ray_session


def main():
    given, output, log = sys.argv[1:]
    settings = BulkSettings(workers=2, memory_gb=0.6)
    with ray_session(num_cpus=3):
        run_bulk(
            ManyUnits(log, seconds=0.08), find_sources([given]), OutputFolder.at(output), settings
        )


if __name__ == "__main__":
    run_job(main)
