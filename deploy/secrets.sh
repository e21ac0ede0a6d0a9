#!/bin/sh
# Make the stack's passwords in the folder $1, once. Each setting is a file named like its variable.
set -eu
cd "$1"
[ ! -s distillery_database_url ] || exit 0
word() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
postgres=$(word) redis=$(word) grafana=$(word)
printf '%s' "$postgres" > postgres_password
printf '%s' "$redis" > redis_password
printf '%s' "$grafana" > grafana_password
printf 'requirepass %s\n' "$redis" > redis.conf
printf 'redis://:%s@redis:6379/0' "$redis" > distillery_broker_url
# The volume is mounted by this stack's containers alone, whose programs run under different users.
chmod 0444 postgres_password redis_password grafana_password redis.conf distillery_broker_url
printf 'postgresql+psycopg://distillery:%s@postgres:5432/distillery' "$postgres" > database_url.new
chmod 0444 database_url.new
mv database_url.new distillery_database_url # last: it says that all others are there
