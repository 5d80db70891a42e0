"""Plays stories: `python -m tests.simulation.run --seeds 500`."""

import argparse
import sys
import time

from tqdm import tqdm

from . import fleet, world


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=500, help="how many stories [default: 500]")
    parser.add_argument("--first", type=int, default=0, help="seed of the first [default: 0]")
    parser.add_argument("--requests", type=int, default=200, help="in each story [default: 200]")
    parser.add_argument("--fleet", action="store_true", help="of several servers behind ingresses, not of one engine")
    args = parser.parse_args()
    began, num_requests = time.perf_counter(), 0
    for seed in tqdm(range(args.first, args.first + args.seeds), unit="story", disable=not sys.stderr.isatty()):
        try:
            if args.fleet:
                fleet.play(of_fleet := fleet.FleetStory(seed, args.requests))
                num_requests += of_fleet.num_requests
            else:
                world.play(of_engine := world.Story(seed, args.requests))
                num_requests += of_engine.num_requests
        except Exception as error:
            print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
            return 1
    seconds = time.perf_counter() - began
    print(f"{args.seeds} stories, {num_requests:,} requests in {seconds:.0f} s: every invariant held")
    return 0


if __name__ == "__main__":
    sys.exit(main())
