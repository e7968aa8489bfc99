from acemerge.cli import main

main()
