"""Share a model or a run on the Hub: `python scripts/push_to_hub.py FOLDER user/name`."""

import argparse
import sys

from tcl_hf.sharing.hub import HubError, push


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folder", help="model's or run's folder")
    parser.add_argument("repo_id", help="user/name; made if it is not there")
    parser.add_argument("--training-state", action="store_true", help="teacher, queues and newest checkpoint too")
    parser.add_argument("--with-code", action="store_true", help="opens without tcl_hf, with trust_remote_code=True")
    parser.add_argument("--private", action="store_true", default=None, help="a new repository is private")
    parser.add_argument("--revision", help="branch; made if it is not there")
    parser.add_argument("--create-pr", action="store_true", help="propose it as a pull request")
    parser.add_argument("--commit-message")
    parser.add_argument("--max-shard-size", default="5GB", help="of a file of weights")
    parser.add_argument("--token", help="that of `hf auth login` if not given")
    args = parser.parse_args()
    commit = push(**vars(args))
    print(commit.pr_url or commit.commit_url)


if __name__ == "__main__":
    try:
        main()
    except HubError as error:
        sys.exit(f"error: {error}")
