"""A stand-in for vspipe, for Pythons without a shared library (vspipe has to load one).

    python pipe.py [-a name=value …] SCRIPT -      the script's first output as y4m on stdout, frame counts on stderr
"""

import runpy
import sys

import vapoursynth as vs


def main(arguments: list[str]) -> int:
    given = dict(word.split("=", 1) for flag, word in zip(arguments, arguments[1:], strict=False) if flag == "-a")
    video, sys.stdout = sys.stdout.buffer, sys.stderr  # nothing but the video may reach the pipe
    try:
        runpy.run_path(arguments[-2], init_globals=given, run_name="__vapoursynth__")
        clip = vs.get_output(0).clip
        clip.output(video, y4m=True, progress_update=lambda n, total: print(f"Frame: {n}/{total}", file=sys.stderr))
    except vs.Error as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
