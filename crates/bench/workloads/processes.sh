# 300 small processes, started as scripts start them: one after the other, in pipes and in substitutions.
i=0
sum=0
while [ $i -lt 60 ]; do
    /bin/true
    n=$(/bin/echo "$i" | /usr/bin/cut -c1)
    sum=$((sum + n))
    /usr/bin/test "$i" -ge 0
    /usr/bin/basename "/some/where/file$i" >/tmp/name
    i=$((i + 1))
done
read -r name </tmp/name
echo "$sum $name"
