#!/bin/sh
# Make stand-ins for the stack's base images from Debian packages, for machines that reach no image registry.
# An image that is there, or can be pulled, is left as it is. Root, podman and debootstrap are needed.
#   sh deploy/verify/bases.sh FOLDER      FOLDER: for what is unpacked; the stand-ins' names are written to FOLDER/made
set -eu
folder=$1 here=$(dirname "$0") mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
bundle=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
mkdir -p "$folder"
touch "$folder/made"

have() { podman image exists "$1" || timeout 60 podman pull -q "$1" > /dev/null 2>&1; }
made() { echo "$1" >> "$folder/made"; }

python=docker.io/library/python:3.11-slim-bookworm
if ! have $python; then
  [ -f "$folder/rootfs/.complete" ] || {
    rm -rf "$folder/rootfs"
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv,python3-pip bookworm "$folder/rootfs" "$mirror" \
      > "$folder/debootstrap.log" 2>&1
    ln -sf python3 "$folder/rootfs/usr/bin/python"
    cp "$bundle" "$folder/rootfs/etc/ssl/certs/ca-certificates.crt" # with the authorities that this machine trusts
    rm -rf "$folder"/rootfs/var/cache/apt/archives/*.deb
    touch "$folder/rootfs/.complete"
  }
  tar -C "$folder/rootfs" -c . | podman import -c 'ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt' - $python > /dev/null
  made $python
fi
for name in library/postgres:17.2-bookworm library/redis:7.4.1-bookworm prom/prometheus:v3.0.1; do
  image=docker.io/$name recipe=${name##*/}
  if ! have "$image"; then
    podman build -q --network host --build-arg BASE=$python -t "$image" "$here/${recipe%%:*}" > /dev/null
    made "$image"
  fi
done
have docker.io/grafana/grafana:11.4.0 || true # of which Debian has no package: the script says that it was left out
