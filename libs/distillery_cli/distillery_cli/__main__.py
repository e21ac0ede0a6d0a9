import sys

from distillery_cli.app import main

sys.exit(main())
