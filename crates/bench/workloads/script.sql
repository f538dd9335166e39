-- sqlite3 in memory: inserts, an index, joins, aggregates, text.
create table item(id integer primary key, kind integer, name text, price real);
begin;
with recursive n(i) as (select 1 union all select i + 1 from n where i < 30000)
insert into item select i, i * 7919 % 97, 'item-' || (i * 31 % 1009), i * 1.25 % 77 from n;
commit;
create index by_kind on item(kind, price);
create table kind(id integer primary key, title text);
insert into kind select distinct kind, 'kind ' || kind from item;
select title, count(*), round(sum(price), 2) from item join kind on kind.id = item.kind group by title order by 3 desc limit 5;
select count(*) from item a join item b on a.kind = b.kind and a.price < b.price and a.id % 200 = 0;
select substr(name, 6, 2) p, count(distinct name), max(length(name)) from item where name like '%9%' group by p order by p limit 5;
update item set price = price * 1.1 where kind in (select id from kind where id % 3 = 0);
delete from item where name glob 'item-5*';
select count(*), round(total(price), 2), min(name) from item;
