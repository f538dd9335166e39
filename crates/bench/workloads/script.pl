# Hashes, strings and regular expressions.
use strict;
use warnings;

my ($x, %count, @lines) = (12345);
for my $i (1 .. 90000) {
    $x = ($x * 1103515245 + 12345) & 0x7fffffff;
    my $word = sprintf "w%d", $x >> 16 & 0xfff;
    $count{$word}++;
    push @lines, "$i:$word" if $i % 3 == 0;
}
my @top = (sort { $count{$b} <=> $count{$a} || $a cmp $b } keys %count)[0 .. 9];
my $text = join "\n", @lines;
my $found = () = $text =~ /\d*7:w1(\d+)\n/g;
(my $other = $text) =~ s/w(\d)(\d+)/$2-$1/g;
my $sum = 0;
$sum = ($sum * 31 + ord) & 0xffffff for split //, substr $other, 0, 120000;
print "@top $found $sum\n";
