#!/usr/bin/env bash
# A long encode in pieces: frame ranges of one script, each into its own x265 file, joined at the end without re-encoding.
#
#   scripts/chunks.sh SCRIPT OUTPUT.mkv FRAMES_A_PIECE [name=value …]      (name=value as for `vspipe -a`)
#
# The ranges are taken from the OUTPUT of the script (vspipe's --start and --end), so every frame has the value it has in
# one uncut encode, bit for bit, wherever the pieces begin. Pieces that exist are kept: run the same command again after
# an interruption, or run it on several machines that share the folder and give each its own part of the list.
# vspipe and ffmpeg are taken from PATH.
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
script=$1 output=$2 piece=$3
shift 3
arguments=()
for setting in "$@"; do arguments+=(-a "$setting"); done

frames=$(vspipe --info "${arguments[@]}" "$script" - | sed -n 's/^Frames: //p')
pieces="$output.pieces"
mkdir -p "$pieces"
: >"$pieces/list.txt"
for ((first = 0; first < frames; first += piece)); do
    last=$((first + piece < frames ? first + piece - 1 : frames - 1))
    name=$(printf '%08d.mkv' "$first")
    printf "file '%s'\n" "$name" >>"$pieces/list.txt"
    [ -e "$pieces/$name" ] && continue
    printf 'frames %d to %d of %d\n' "$first" "$last" "$frames" >&2
    vspipe -c y4m --start "$first" --end "$last" "${arguments[@]}" "$script" - |
        ffmpeg -loglevel error -y -f yuv4mpegpipe -i - -c:v libx265 -x265-params log-level=error -crf 16 -preset medium "$pieces/part-$name"
    mv "$pieces/part-$name" "$pieces/$name" # only whole pieces have their name
done
ffmpeg -loglevel error -y -f concat -safe 0 -i "$pieces/list.txt" -c copy "$output"
printf '%s\n' "$output"
