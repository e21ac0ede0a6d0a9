#!/usr/bin/env bash
# Build the images and run the whole demo through compose under podman: train, distil, convert, generate, render,
# stop, start again and find everything as it was. Ends with exit code 0 and cleans up after itself.
#   deploy/verify.sh              the log goes to the terminal
#   deploy/verify.sh --write      and, shortened, into docs/deployment.md
# Needed: root, python3, the Debian packages podman runc netavark aardvark-dns iptables, and a network with Debian's and
# Python's package indexes; where no image registry answers, debootstrap too, for stand-ins of the base images.
#   VERIFY_TORCH_INDEX=URL        where the CPU build of torch comes from
#   VERIFY_WHEELS=FOLDER          wheels that pip may take instead, such as a CPU build of torch
#   VERIFY_STEPS=N                training steps of each model (default 60)
#   VERIFY_IMAGES=1               take our images of an earlier run with VERIFY_KEEP=1, and say so
#   VERIFY_KEEP=1                 keep the images
set -euo pipefail
cd "$(dirname "$0")/.."
work=$PWD/out/verify log=$PWD/out/verify/log.txt steps=${VERIFY_STEPS:-60}
mkdir -p "$work"
: > "$log"

export DISTILLERY_IMAGE_TAG=0.0.0-verify DISTILLERY_JOBS_PORT=${VERIFY_JOBS_PORT:-57051}
export DISTILLERY_SAMPLER_PORT=${VERIFY_SAMPLER_PORT:-57052}
export DISTILLERY_TORCH_INDEX_URL=${VERIFY_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
build_args=(--format docker --layers=false --network host) # without kept layers: half the disk
[ -z "${VERIFY_WHEELS:-}" ] || build_args+=(-v "$VERIFY_WHEELS:$VERIFY_WHEELS:ro" --build-arg "PIP_FIND_LINKS=$VERIFY_WHEELS")

if [ ! -d /run/systemd/system ] && [ -z "${CONTAINERS_CONF:-}" ]; then # podman's defaults expect systemd
  export CONTAINERS_CONF=$work/containers.conf
  printf '%s\n' '[containers]' "default_ulimits=[\"nofile=$(ulimit -Hn):$(ulimit -Hn)\",\"nproc=4096:4096\"]" \
    '[network]' 'network_backend="netavark"' \
    '[engine]' 'runtime="runc"' 'cgroup_manager="cgroupfs"' 'events_logger="file"' > "$CONTAINERS_CONF"
fi
[ -x "$work/venv/bin/podman-compose" ] || { python3 -m venv "$work/venv" && "$work/venv/bin/pip" install -q podman-compose==1.6.0; }

say() { printf '%-44s %s\n' "$1" "$2" | tee -a "$log"; }
fail() { say "$1" "FAILED"; "$work/venv/bin/podman-compose" -p distillery-verify logs --tail 40 2>&1 | tail -200 >&2 || true; exit 1; }
compose() { "$work/venv/bin/podman-compose" -p distillery-verify "$@" >> "$work/compose.log" 2>&1; }
container() { echo "distillery-verify_$1_1"; }
ours="trainer trainer-worker converter sampler"

timed() { # LABEL COMMAND...: run it, say how long it took
  local label=$1 began=$SECONDS
  shift
  "$@" || fail "$label"
  say "$label" "ok, $((SECONDS - began)) s"
}
healthy() { # SERVICE: its own health check, until it says yes
  local began=$SECONDS
  until podman healthcheck run "$(container "$1")" > /dev/null 2>&1; do
    [ $((SECONDS - began)) -lt 180 ] || fail "health of $1"
    sleep 2
  done
  say "health of $1" "ok after $((SECONDS - began)) s"
}
all_healthy() { for service in redis postgres $ours; do healthy "$service"; done; }
cli() { # the command line, beside the Jobs API; the sampler is another container
  podman exec -e DISTILLERY_JOBS_HOST=127.0.0.1 -e DISTILLERY_SAMPLER_HOST=sampler "$(container trainer)" distillery "$@"
}
build() { for service in $ours; do [ "$service" = trainer-worker ] || compose --podman-build-args="${build_args[*]}" build "$service" || return 1; done; }
up() { # --no-deps: podman 4 starts nothing that depends on a container which has ended, as `secrets` has
  compose up -d --no-build --no-deps secrets
  podman wait "$(container secrets)" > /dev/null
  compose up -d --no-build --no-deps redis postgres $ours
}
told() { # COMMAND: what it says as JSON, in a fixed order
  cli "$1" --json | python3 -c 'import json, sys; print(json.dumps(json.load(sys.stdin), sort_keys=True))'
}
succeeds() { # LABEL COMMAND...: of the command line; its output is kept aside
  local label=$1
  shift
  timed "$label" cli "$@" >> "$work/cli.log" 2>&1 || fail "$label"
  tail -n 1 "$log"
}
picture() { # FILE COMMAND...: let the sampler make a picture, give its sha256
  local file=$1
  shift
  cli "$@" --out "/tmp/$file" >> "$work/cli.log" 2>&1 || fail "distillery $1 $2"
  podman exec "$(container trainer)" sha256sum "/tmp/$file" | cut -d' ' -f1
}
scraped() { # JOB: whether Prometheus reached its process
  podman exec "$(container prometheus)" wget -qO- "http://127.0.0.1:9090/api/v1/query?query=up%7Bjob=%22$1%22%7D" | grep -q '"1"\]'
}
observed() { # the profile `observability`; Grafana where its image can be had
  local services=prometheus jobs="jobs trainer-worker converter sampler prometheus" began=$SECONDS
  ! podman image exists docker.io/grafana/grafana:11.4.0 || services="prometheus grafana"
  compose --profile observability up -d --no-build --no-deps $services
  for service in $services; do healthy "$service"; done
  [ "$services" != prometheus ] || say "health of grafana" "not asked: its image cannot be had here"
  for job in $jobs; do
    until scraped "$job"; do
      [ $((SECONDS - began)) -lt 180 ] || fail "Prometheus scrapes $job"
      sleep 2
    done
  done
  say "Prometheus scrapes every process" "ok: $jobs"
}
confined() { # SERVICE: not root, nothing to write on but its volumes and /tmp
  local id
  id=$(podman exec "$(container "$1")" id -u)
  [ "$id" = 10001 ] || fail "$1 runs as user $id"
  ! podman exec "$(container "$1")" sh -c 'touch /opt/venv/x' 2> /dev/null || fail "$1 can write its program"
  ! podman exec "$(container "$1")" sh -c 'grep -q "CapEff:.*[1-9a-f]" /proc/1/status' || fail "$1 has capabilities"
}
clean_up() {
  compose --profile observability down -v || true
  [ -z "${VERIFY_KEEP:-}" ] || return 0
  for service in trainer converter sampler; do podman rmi -f "distillery/$service:$DISTILLERY_IMAGE_TAG" > /dev/null 2>&1 || true; done
  { xargs -r podman rmi -f < "$work/made" > /dev/null 2>&1 && rm "$work/made"; } || true
}
trap clean_up EXIT

say "podman" "$(podman --version | cut -d' ' -f3), podman-compose 1.6.0"
timed "base images" sh deploy/verify/bases.sh "$work" >> "$work/compose.log" 2>&1
tail -n 1 "$log"
say "stand-ins from Debian packages" "$(sed 's|.*/||' "$work/made" | paste -sd ' ' | sed 's/^$/none/')"
if [ -n "${VERIFY_IMAGES:-}" ]; then say "images" "built earlier, by the same Dockerfile"; else timed "images built" build; fi
for service in trainer converter sampler; do
  bytes=$(podman image inspect -f '{{.Size}}' "distillery/$service:$DISTILLERY_IMAGE_TAG")
  say "size of distillery/$service" "$((bytes / 1000000)) MB"
done

timed "compose up" up
all_healthy
for service in $ours; do confined "$service"; done
say "user 10001, read-only, no capabilities" "ok: $ours"
for port in "$DISTILLERY_JOBS_PORT" "$DISTILLERY_SAMPLER_PORT"; do
  (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null || fail "port $port of this machine"
done
say "published ports answer on 127.0.0.1" "ok"

short=(-s "steps=$steps" -s evaluate.num_samples=200)
succeeds "train a teacher, watched" submit edm_digits "${short[@]}" --watch
succeeds "distil a student from it, watched" submit dmd2 -s teacher.artifact=edm-digits "${short[@]}" --watch
succeeds "convert it to ONNX" convert dmd2-digits
succeeds "train a radiance field, watched" submit nerf_procedural -s "steps=$steps" --watch
digits=$(picture digits.png generate dmd2-digits --labels 0-9 --seed 7)
say "the sampler generates (sha256)" "${digits:0:16}"
view=$(picture view.png render procedural-scene --azimuth 45 --size 64)
say "the sampler renders (sha256)" "${view:0:16}"
observed
jobs=$(told jobs) models=$(told models)

timed "compose down" compose --profile observability down
timed "compose up again" up
all_healthy
[ "$(told jobs)" = "$jobs" ] || fail "the same jobs"
say "the same jobs" "ok: $(grep -o SUCCEEDED <<< "$jobs" | wc -l) succeeded"
[ "$(told models)" = "$models" ] || fail "the same models"
[ "$(picture digits.png generate dmd2-digits --labels 0-9 --seed 7)" = "$digits" ] || fail "the same picture"
[ "$(picture view.png render procedural-scene --azimuth 45 --size 64)" = "$view" ] || fail "the same view"
say "the same models, picture and view" "ok"
! podman logs "$(container trainer-worker)" 2>&1 | grep -qF "$(podman exec "$(container trainer)" cat /run/secrets/postgres_password)" || fail "no password in the logs"
say "no password in the worker's log" "ok"

if [ "${1:-}" = --write ]; then sh deploy/verify/page.sh "$log" docs/deployment.md; fi
