#!/bin/sh
# Make a root file system of the named mounts that cannot be written, with one /tmp as
# `docker run --read-only --tmpfs /tmp` gives it. unshare calls this in namespaces of its own, so
# nothing of it outlives them.
#
# room.sh ROOT SOURCE:PLACE[:rw]... -- COMMAND...
set -eu
root=$1
shift

mount -t tmpfs -o mode=755 room "$root"
# First, so that what is mounted may lie below it: a checkout in /tmp.
mkdir "$root/tmp"
mount -t tmpfs -o rw,noexec,nosuid,nodev,size=4g,mode=1777 tmp "$root/tmp"
while [ "$1" != -- ]; do
  source=${1%%:*} rest=${1#*:}
  place=$root${rest%:rw}
  if [ -d "$source" ]; then
    mkdir -p "$place"
  elif [ ! -e "$place" ]; then
    mkdir -p "${place%/*}"
    : > "$place"
  fi
  mount --bind "$source" "$place"
  case $1 in
    *:rw) ;;
    /dev/*) mount -o remount,bind,nosuid,noexec "$place" ;;
    *) mount -o remount,bind,ro,nosuid,nodev "$place" ;;
  esac
  shift
done
shift
mkdir -p "$root/proc"
mount -t proc proc "$root/proc"
mount -o remount,ro "$root"
ip link set lo up
exec "$@"
