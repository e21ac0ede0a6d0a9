#!/bin/sh
# What the stack needs of the official image's entry point: a database and its user, once; then the server.
set -eu
mkdir -p "$PGDATA" /var/run/postgresql
chown -R postgres "$PGDATA" /var/run/postgresql
chmod 700 "$PGDATA"
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  cp "$POSTGRES_PASSWORD_FILE" /tmp/password
  chown postgres /tmp/password
  gosu postgres initdb -E UTF8 --locale=C.UTF-8 -U "$POSTGRES_USER" --pwfile=/tmp/password -A scram-sha-256 > /dev/null
  rm /tmp/password
  echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
  sed -i 's/^local.*/local all all trust/' "$PGDATA/pg_hba.conf"
  gosu postgres pg_ctl -w -o "-c listen_addresses=''" start > /dev/null
  gosu postgres createdb -U "$POSTGRES_USER" "$POSTGRES_DB"
  gosu postgres pg_ctl -w -m fast stop > /dev/null
fi
exec gosu postgres "$@" -c 'listen_addresses=*'
